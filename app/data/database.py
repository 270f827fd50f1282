"""The database of jobs and history: SQLite in a file, or PostgreSQL. Its functions block: call them in native threads.
"""
import contextlib
import fcntl
import threading
from pathlib import Path

import sqlalchemy
from sqlalchemy import event

CONNECT_WITHIN_S = 2
STATEMENT_WITHIN_S = 5
MIGRATE_WITHIN_S = 600
LOCK_NUMBER = 0x6D6F6465  # of PostgreSQL's advisory lock around migrations
POOL = 8                  # connections per process


class Database:
    """Connections to the database, made when they are first needed; tables are made or migrated then too."""

    def __init__(self, url):
        self.url = sqlalchemy.make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            arguments = {"timeout": STATEMENT_WITHIN_S, "check_same_thread": False}
        else:
            arguments = {"connect_timeout": CONNECT_WITHIN_S, "options": f"-c statement_timeout={STATEMENT_WITHIN_S}s "
                         f"-c lock_timeout={STATEMENT_WITHIN_S}s -c idle_in_transaction_session_timeout=60s"}
        self.engine = sqlalchemy.create_engine(self.url, connect_args=arguments, pool_pre_ping=not self.is_sqlite,
                                               pool_size=POOL, max_overflow=0, pool_timeout=CONNECT_WITHIN_S)
        self.current, self.lock = False, threading.Lock()
        if self.is_sqlite:
            event.listen(self.engine, "connect", connected)
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    @contextlib.contextmanager
    def begin(self):
        """A connection in a transaction, which is committed at the end of the block. Raises SQLAlchemyError, OSError;
        StartError for tables that a newer version has made."""
        self.migrate()
        with self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def read(self):
        """A connection for reading."""
        self.migrate()
        if self.is_sqlite:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                yield connection
            return
        with self.engine.connect() as connection:
            yield connection

    def migrate(self):
        """Bring the tables up to date, once per process. Several processes may do so at once."""
        if self.current:
            return
        with self.lock:
            if self.current:
                return
            if self.is_sqlite:
                Path(self.url.database).parent.mkdir(parents=True, exist_ok=True)
            from app.data import migrations
            with self.alone() as connection:
                migrations.upgrade(connection)
            self.current = True

    @contextlib.contextmanager
    def alone(self):
        """A connection in a transaction that no other process of this service's has at the same time."""
        if self.is_sqlite:
            with open(f"{self.url.database}.lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                with self.engine.begin() as connection:
                    yield connection
            return
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{MIGRATE_WITHIN_S}s'")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{MIGRATE_WITHIN_S}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK_NUMBER})")
            yield connection

    def close(self):
        self.engine.dispose()


def connected(connection, _):
    """A new SQLite connection: readers do not wait for writers, and transactions begin with the write lock."""
    connection.isolation_level = None
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")
