"""What can be wrong with an evaluation as a whole; what is wrong with one photo is a row's status."""

from __future__ import annotations


class EvaluateError(ValueError):
    """`str()` is `CODE: words`. Codes: EMPTY, NO_PAIRS, BAD_PEOPLE, BAD_SETTING, OUT_IN_TREE; of a test with
    viewers: NO_FACES, NO_VIEWER_PAGE, BAD_ANSWERS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
