"""The one error that stands for a user's mistake."""


class UserError(ValueError):
    """Something that the user can put right. The message is one line that says what and how."""
