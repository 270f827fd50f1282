"""An asyncio event loop in a native thread, one per process, and how greenlets and native threads wait for what runs
there."""
import asyncio
import atexit
import contextlib
import os
import threading
import weakref

import gevent
from gevent.event import Event

lock = threading.Lock()
own = {}         # {process: its loop}, as a process that was forked has none
finalizers = []  # one for each session, of which a process makes few


def loop():
    """The event loop of this process, started with the first call."""
    with lock:
        if os.getpid() not in own:
            own.clear()
            own[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=own[os.getpid()].run_forever, name="outbound", daemon=True).start()
            atexit.register(finish)
        return own[os.getpid()]


def run(coroutine):
    """Return a coroutine's value, or raise its exception. A greenlet that waits here blocks no other; whoever stops
    waiting cancels the coroutine."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        if isinstance(gevent.getcurrent(), gevent.Greenlet):
            done, greenlets = Event(), gevent.get_hub().loop
            future.add_done_callback(lambda _: greenlets.run_callback_threadsafe(done.set))
            done.wait()
        return future.result()
    finally:
        future.cancel()


def close_with(owner, close):
    """Have the coroutine function close() run when owner is garbage, or the process ends. close must not refer to
    owner."""
    finalizers.append(weakref.finalize(owner, start_closing, loop(), close))


def start_closing(its_loop, close):
    if own.get(os.getpid()) is its_loop:
        asyncio.run_coroutine_threadsafe(close(), its_loop)


def finish():
    """When the process ends: close what is still open."""
    for finalizer in finalizers:
        finalizer()
    if os.getpid() in own:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop()).result(1)
