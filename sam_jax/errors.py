"""The one exception that means: the person who launched the run can mend this; its wording."""

import re

import jax

EXIT_USER_ERROR = 2

# What every run that diverges says; by it a search tells it from one that merely broke.
NOT_FINITE = 'is not finite at step'

NO_MEMORY = 'The memory of this machine is used up.'

# What Python says of code in C that failed and raised nothing.
_SILENT = 'error return without exception set'


class UserError(ValueError):
    """A bad setting, a missing dataset, a damaged file or a diverged run.

    Its message is one sentence that names the field, the value and what would be right;
    `main.py` prints it without a traceback and exits with status 2.
    """


class Preempted(Exception):
    """The run was asked to stop and has saved its state, on all processes; start it to go on."""


def told(error: BaseException) -> str | None:
    """Returns one sentence of what a person can mend, or None: the error is one of the code.

    That is a UserError, memory that is used up, another process that is gone, or a file that
    cannot be read or written.
    """
    if isinstance(error, UserError):
        return str(error)
    if is_memory(error):
        silent = _SILENT in str(error)
        return (
            'Code in C failed without a word, as where memory is used up.' if silent else NO_MEMORY
        )
    if isinstance(error, OSError) and error.strerror:
        return f'{error.filename or "A file"}: {error.strerror}.'
    # Where a program is called and not waited for, JAX raises the same as a ValueError.
    if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
        said = first_line(error)
        if 'RESOURCE_EXHAUSTED' in said:
            return f'The memory is used up: {said}'
        if any(words in said for words in _GONE):
            return f'Another process of the run is gone: {said}'
    return None


def is_memory(error: BaseException) -> bool:
    """Whether an error, or one during which it was raised, is of memory that is used up."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, MemoryError) or any(words in str(found) for words in _NO_THREAD):
            return True
        if isinstance(found, SystemError) and _SILENT in str(found):
            return True  # of code in C that got none and did not say so
        found = found.__cause__ or found.__context__
    return False


# What Python says where a thread gets no memory: one of its own, and the clock of the watchdog.
_NO_THREAD = ("can't start new thread", 'unable to start watchdog thread')

# What gloo and JAX's coordination service say of a process that does not answer.
_GONE = ('gloo', 'Gloo', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'CANCELLED')


def of_system(error: BaseException) -> str:
    """Returns what the system says of a file that cannot be written, without what is around it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r": ([^:\[\]]+) \[os_error_code='", str(error))  # as TensorStore has it
    return found[1] if found else first_line(error)


def first_line(error: BaseException | str) -> str:
    """Returns what an exception says, or a text, in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]
