"""What a worker is asked to do and to survive: in a module of its own, which its process imports at once."""

import multiprocessing
import os
import signal
import time


def spin(watch):
    watch.turn("spinner")
    while True:
        pass


def breathe(watch, seconds):
    """Longer than the limit, but with signs of life."""
    for _ in range(int(seconds / 0.2)):
        watch.turn("breather")
        time.sleep(0.2)
    return os.getpid()


def swell(watch):
    return bytearray(2**40) and None


def lock(watch):
    """Keeps a semaphore, as tqdm does, and tells its file's name."""
    lock.kept = multiprocessing.Lock()
    return f"sem.{lock.kept._semlock.name.removeprefix('/')}"


def fall(watch):
    watch.say("about to fall")
    os.kill(os.getpid(), signal.SIGKILL)
