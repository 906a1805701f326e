"""The one error that users see: a line, not a traceback."""


class BadInput(Exception):
    """What a user, a file or a link got wrong: one line, exit code 2.

    `found` what is there, `expected` what should be there, `mend` what to do about it.
    """

    def __init__(self, found: str, *, expected: str, mend: str) -> None:
        super().__init__(f"{found}; expected {expected}. {mend}")
        self.found, self.expected, self.mend = found, expected, mend
