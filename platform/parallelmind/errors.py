"""Errors that a user can cause. Workloads turn them into exit 2 and one line; a server turns them into a 4xx."""


class UserError(ValueError):
    """A wrong value, named in one line with its field and its remedy."""


class Overloaded(UserError):  # noqa: N818
    """Nothing is wrong with it, but there is no room now."""


class Notice(UserWarning):
    """Something that a user should know and need not mend; workloads print it as one line."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
