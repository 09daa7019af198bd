"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """A mistake a user can fix; the message is one sentence that names the thing and says what to do."""
