"""Connections to PostgreSQL that do not wait forever. Its own limits of time are of no use if the server hangs, or its
machine is gone."""
import time

import psycopg

ANSWER_WITHIN_S = 6  # more than statements may take


class Connection(psycopg.Connection):
    answer_within_s = ANSWER_WITHIN_S

    def wait(self, generator, interval=0.1, timeout=None):
        if timeout is not None:
            return super().wait(generator, interval, timeout)
        until = time.monotonic() + self.answer_within_s
        try:
            return super().wait(generator, interval, self.answer_within_s)
        except psycopg.OperationalError:
            if time.monotonic() >= until:
                self.pgconn.finish()  # an answer that still comes must not be taken for that of the next statement
            raise


def connect(dialect, record, arguments, parameters):
    """For SQLAlchemy's event do_connect."""
    return Connection.connect(*arguments, **parameters)
