"""The one error that stands for a user's mistake, and other errors in one line."""


class UserError(ValueError):
    """Something that the user can put right. The message is one line that says what and how."""


class OutOfReachError(UserError):
    """The Hub cannot be reached, and what is asked for was not downloaded before."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without the full stop; its class if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__
