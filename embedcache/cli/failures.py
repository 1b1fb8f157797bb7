"""How a program ends: a user's error as one line, a bug with its traceback."""

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from embedcache.errors import (
    EmbedcacheError,
    PathError,
    is_out_of_memory,
    one_line,
    show_faults,
    visible,
)
from embedcache.files import disk_full_message, io_reason, is_io_error
from embedcache.progress import close_bars
from embedcache.registry import used_plugins

_BUG = 70
_INTERRUPTED = 130
_NEXT_STEPS = {
    errno.EMFILE: "raise the limit of open files with ulimit -n, or use fewer --threads",
    errno.EFBIG: "raise the limit of file sizes with ulimit -f, or use a file system with larger files",
    errno.EIO: "check the disk, and rerun the same command",
    errno.ESTALE: "check the file system, and rerun the same command",
    errno.ENAMETOOLONG: "use shorter names",
}
"""Error of the operating system -> what to do, where its own text does not say it."""


def run_program(run: Callable[[], object]) -> None:
    """Run a program: the command line, or a pipeline.

    Exit codes: 0 success; 1 a user's error, printed as one line; 70 a bug, in embedcache or a plug-in,
    with its traceback; 130 interrupted.
    EMBEDCACHE_DEBUG=1 prints the traceback of a user's error too.
    """
    show_faults()
    _silence_libraries()
    try:
        _check_arguments()
        run()
    except KeyboardInterrupt:
        end_interrupted()
    except EmbedcacheError as error:
        _fail(str(error), error)
    except BrokenPipeError:  # whoever read the output has ended, as in `embedcache … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes its standard output when it exits
        sys.exit(1)
    except OSError as error:
        _fail(_os_error_line(error), error)
    except Exception as error:  # noqa: BLE001
        if is_out_of_memory(error):
            reason = one_line(error).rpartition("DefaultCPUAllocator: ")[2]  # without the line in torch's source
            _fail(f"out of memory: {reason}; use smaller settings, or give this process more memory")
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            _fail("can't start new thread; raise the limit of processes with ulimit -u, or use fewer --threads")
        if not is_io_error(error):
            _report_bug()
        _fail(f"a remote service failed: {io_reason(error)}; check the address and the network")
    finally:
        _end_on_interrupt()


def end_interrupted() -> NoReturn:
    """End the process after Ctrl-C: outputs are whole or absent, and what resumes goes on from its finished work."""
    _end_on_interrupt()
    close_bars()
    print("Interrupted. Run the same command again.", file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _end_on_interrupt() -> None:
    """Let Ctrl-C end the process at once from now on: while it exits, Python would print it as a traceback."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _silence_libraries() -> None:
    """Silence what libraries print of errors that they raise too, and of kinds of URLs that they have not tested."""
    logging.getLogger("gcsfs").addFilter(_is_not_raised)
    warnings.filterwarnings("ignore", "UPath '.*' filesystem not explicitly implemented", UserWarning)


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Return false for tracebacks that the module of retries logs before it raises, and for a step before an error."""
    is_raised = record.module == "retry" and bool(record.exc_info)
    return not (is_raised or record.getMessage().startswith("Could not determine bucket type"))


def _check_arguments() -> None:
    """Check that names can be stored and printed; a name of other bytes has them as lone surrogates."""
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise PathError(f"expected arguments in UTF-8, got {word!r}; rename the file") from None


def _os_error_line(error: OSError) -> str:
    """Return the file, the reason of the operating system, and the next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = disk_full_message()
    else:
        step = _NEXT_STEPS.get(error.errno or 0)
        reason = f"{io_reason(error)}; {step}" if step else io_reason(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _fail(message: str, error: Exception | None = None) -> NoReturn:
    close_bars()
    message = "; ".join([message, *getattr(error, "__notes__", ())])
    if os.environ.get("EMBEDCACHE_DEBUG", "0") != "0":
        traceback.print_exc()
    print("error:", visible(message).replace("\n", r"\n"), file=sys.stderr)  # a name may have a line break
    sys.exit(1)


def _report_bug() -> NoReturn:
    close_bars()
    traceback.print_exc()
    used = sorted(used_plugins() - {"embedcache"})
    line = "This is a bug in embedcache, not an error of yours: please report it with the text above."
    if used:
        line = (
            f"This is a bug, maybe of a plug-in: run the contract test of {_plugin_names(used)}, see "
            "embedcache.testing; if it passes, please report the text above."
        )
    print(line, file=sys.stderr)
    sys.exit(_BUG)


def _plugin_names(modules: Sequence[str]) -> str:
    """Return the modules of plug-ins, each with the package that installed it and its version."""
    from importlib.metadata import packages_distributions, version

    owners = packages_distributions()
    found = {module: [f"{name} {version(name)}" for name in sorted({*owners.get(module, ())})] for module in modules}
    return " and ".join(f"{name} ({', '.join(packages)})" if packages else name for name, packages in found.items())
