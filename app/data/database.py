"""The database of jobs and history: SQLite in a file, or PostgreSQL. Its functions block: call them in native threads.

No call waits for long: not for a server that hangs, nor for other processes, nor for a connection of the pool.
"""
import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from pathlib import Path

import sqlalchemy
from sqlalchemy import event, select

from app.data.schema import REVISION, service

CONNECT_WITHIN_S = 2
STATEMENT_WITHIN_S = 3    # less than background.py waits, so that the reason is known
LOCK_WITHIN_S = 8         # of SQLite, which has one writer at a time; less than submitting and leases wait
LOCK_TRY_MS = 20          # after which SQLite's pauses between its tries get long
LOCKED = "database is locked"  # also while another process mends the file after one was killed
MIGRATE_WITHIN_S = 600
LOCK_NUMBER = 0x6D6F6465  # of PostgreSQL's advisory lock around migrations
POOL = 4                  # connections per process
SQLITE_POOL = 20          # as many as a process has threads that use it: writers wait for each other with one of them
RENEW_AFTER_S = 300       # of an idle connection, which a firewall may have forgotten


class Database:
    """Connections to the database, made when they are first needed; tables are made or migrated then too.

    `begin` and `read` raise SQLAlchemyError and OSError while the database is away, and StartError if its tables are
    of a newer version.
    """

    def __init__(self, url):
        self.url = sqlalchemy.make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            arguments = {"timeout": LOCK_WITHIN_S, "check_same_thread": False}
            of_backend = {"pool_size": SQLITE_POOL}
        else:
            of_backend = {"pool_size": POOL, "pool_pre_ping": True, "pool_recycle": RENEW_AFTER_S,
                          "use_native_hstore": False}
            arguments = {"connect_timeout": CONNECT_WITHIN_S, "options": f"-c statement_timeout={STATEMENT_WITHIN_S}s "
                         f"-c lock_timeout={STATEMENT_WITHIN_S}s -c idle_in_transaction_session_timeout=60s"}
        self.engine = sqlalchemy.create_engine(
            self.url, connect_args=arguments, max_overflow=0, pool_timeout=CONNECT_WITHIN_S, hide_parameters=True,
            **of_backend)
        self.current, self.lock, self.known_name = False, threading.Lock(), None
        if self.is_sqlite:
            event.listen(self.engine, "connect", connected)
            event.listen(self.engine, "begin", begin)
        else:
            from app.data import postgres
            event.listen(self.engine, "do_connect", postgres.connect)

    @contextlib.contextmanager
    def begin(self, lock_within_s=None):
        """A connection in a transaction, which is committed at the end of the block. lock_within_s: how long it waits
        for SQLite's other writers, if not for LOCK_WITHIN_S."""
        self.migrate()
        options = {"lock_within_s": LOCK_WITHIN_S if lock_within_s is None else lock_within_s}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def read(self):
        """A connection for reading, which sees one state of the database and waits for no writer."""
        self.migrate()
        with self.engine.connect().execution_options(is_read=True) as connection:
            if not self.is_sqlite:
                yield connection
                return
            with statements_end(connection):
                yield connection

    def name(self):
        """By which what belongs to this database is told from that of others."""
        if self.known_name is None:
            with self.read() as connection:
                self.known_name = connection.execute(select(service.c.id)).scalar_one()
        return self.known_name

    # --- migrations ---

    def migrate(self, wait_s=LOCK_WITHIN_S):
        """Bring the tables up to date, once per process; if another one is at it, wait for it that long. Returns
        whether anything was done."""
        if self.current:
            return False
        if not self.lock.acquire(timeout=wait_s):
            raise sqlalchemy.exc.TimeoutError("the tables are being migrated")
        try:
            if self.current:
                return False
            is_old = self.revision() != REVISION
            if is_old:
                from app.data import migrations  # 20 MB and 0.2 s
                with self.alone(wait_s) as connection:
                    migrations.upgrade(connection)
            self.current = True
            return is_old
        finally:
            self.lock.release()

    def revision(self):
        """That of the tables; None if there are none."""
        if self.is_sqlite:
            create_file(Path(self.url.database))
        with self.engine.connect().execution_options(is_read=True) as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return None
            return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()

    @contextlib.contextmanager
    def alone(self, wait_s):
        """A connection in a transaction that no other process of this service's has at the same time. What is not
        committed leaves no trace, tables included."""
        if self.is_sqlite:
            with locked(f"{self.url.database}.lock", wait_s), self.engine.begin() as connection:
                yield connection
            return
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{wait_s}s'")
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.connection.dbapi_connection.answer_within_s = MIGRATE_WITHIN_S
            connection.detach()  # it is not for the pool
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_NUMBER})")
            yield connection

    def close(self):
        self.engine.dispose()


def was_too_slow(error):
    """Whether the database has ended a statement because it took too long, or others wrote for too long."""
    cause = getattr(error, "orig", None)
    return type(cause).__name__ == "QueryCanceled" or str(cause) in ("interrupted", LOCKED)


def had_no_connection(error):
    """Whether all connections of the pool were taken for too long."""
    return isinstance(error, sqlalchemy.exc.TimeoutError) and error.code == "3o7r"  # SQLAlchemy's code of that alone


# --- SQLite ---

def create_file(path):
    """The database's file, which nobody else may read; SQLite gives those beside it the same permissions."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def connected(connection, _):
    """A new SQLite connection: readers do not wait for writers, and what is committed is on the disk."""
    connection.isolation_level = None  # transactions begin where `begin` says
    until = time.monotonic() + LOCK_WITHIN_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:  # SQLite does not wait for others here that do the same
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def begin(connection):
    """With the write lock, unless the transaction only reads: one that took it later would fail instead of waiting.

    SQLite's own pauses between its tries grow to 0.1 s: who has waited for long would come last, or never."""
    options = connection.get_execution_options()
    if options.get("is_read"):
        connection.exec_driver_sql("BEGIN")
        return
    until, raw = time.monotonic() + options.get("lock_within_s", LOCK_WITHIN_S), connection.connection.dbapi_connection
    raw.execute(f"PRAGMA busy_timeout = {LOCK_TRY_MS}")
    try:
        while True:
            try:
                raw.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.Error as e:  # SQLAlchemy does not make it one of its own here, as of other statements
                if str(e) != LOCKED or time.monotonic() > until:
                    raise sqlalchemy.exc.OperationalError("BEGIN IMMEDIATE", None, e) from e
    finally:
        raw.execute(f"PRAGMA busy_timeout = {1000 * LOCK_WITHIN_S}")


@contextlib.contextmanager
def statements_end(connection):
    """In the block, an SQLite connection's statements end once STATEMENT_WITHIN_S are over."""
    until, raw = time.monotonic() + STATEMENT_WITHIN_S, connection.connection.dbapi_connection
    raw.set_progress_handler(lambda: time.monotonic() > until, 10_000)  # of SQLite's instructions: a millisecond
    try:
        yield
    finally:
        raw.set_progress_handler(None, 0)


@contextlib.contextmanager
def locked(path, wait_s):
    """Hold a file's lock, which ends with its holder. Raises sqlalchemy's TimeoutError."""
    until = time.monotonic() + wait_s
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as e:
                if time.monotonic() > until:
                    raise sqlalchemy.exc.TimeoutError("another process migrates the tables") from e
                time.sleep(0.05)
        yield
