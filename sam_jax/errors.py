"""The one exception that means: the person who launched the run can mend this."""


class UserError(ValueError):
    """A bad setting, a missing dataset, a damaged file or a diverged run.

    Its message is one sentence that names the field, the value and what would be right;
    `main.py` prints it without a traceback and exits with status 2.
    """
