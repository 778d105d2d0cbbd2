"""The one exception that means: the person who launched the run can mend this; its wording."""

EXIT_USER_ERROR = 2

# What every run that diverges says; by it a search tells it from one that merely broke.
NOT_FINITE = 'is not finite at step'


class UserError(ValueError):
    """A bad setting, a missing dataset, a damaged file or a diverged run.

    Its message is one sentence that names the field, the value and what would be right;
    `main.py` prints it without a traceback and exits with status 2.
    """


def first_line(error: BaseException | str) -> str:
    """Returns what an exception says, or a text, in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
