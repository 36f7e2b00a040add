"""What is wrong with data that a user gave: every problem found, one line each."""


class DataError(ValueError):
    """Sources, a tokenizer or a token store that cannot be used; holds every problem found, for a person to read."""

    def __init__(self, *problems: str) -> None:
        """Take one line for each problem: what, where, and the way out."""
        super().__init__("\n".join(problems))
        self.problems = problems


class StoreError(DataError):
    """A token store on disk that is missing, damaged or of another make."""
