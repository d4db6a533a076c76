"""A progress bar where tqdm is installed, a line every tenth of the way where it is not."""

import sys
import time


def progress(steps, description, start=0):
    """Yield start, …, steps − 1, showing on stderr how far along it is; description None is silent."""
    if description is None:
        yield from range(start, steps)
        return
    try:
        from tqdm import tqdm
    except ImportError:
        begun, tenth = time.monotonic(), max(1, (steps - start) // 10)
        for step in range(start, steps):
            yield step
            if (step + 1 - start) % tenth == 0:
                seconds = time.monotonic() - begun
                print(f"{description}: {step + 1}/{steps}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return
    yield from tqdm(range(start, steps), desc=description, initial=start, total=steps, mininterval=2, file=sys.stderr)
