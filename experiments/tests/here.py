"""What spares the tests of this room seconds."""

from concurrent.futures import ThreadPoolExecutor


class Here(ThreadPoolExecutor):
    """Stands in for the ProcessPoolExecutor of lab and bench: runs are made in this process, one by one.

    test_lab starts real ones.
    """

    def __init__(self, workers, context, initializer=None):
        super().__init__(1)
