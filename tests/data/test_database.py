"""The database makes and migrates its tables itself, whoever comes first, and comes back by itself after an outage."""
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from conftest import ROOT, need
from servers import Postgres, is_running
from sqlalchemy import func, insert, select

from app.config import StartError
from app.data import database as module
from app.data import postgres
from app.data.database import Database, was_too_slow
from app.data.schema import REVISION, deliveries, jobs, metadata

RETURNS_WITHIN_S = 120


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'data' / 'service.db'}"
    return request.getfixturevalue("postgres_server").database()


@pytest.fixture
def database(url):
    found = Database(url)
    yield found
    found.close()


def row(number, **columns):
    return {"id": f"{number}", "job_id": "a", "url": "", "state": "pending", "created_at": 1.0, "attempts_json": "[]",
            **columns}


def count(database):
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(deliveries)).scalar()


def run_all(programs):
    """Run Python programs side by side; returns their exit codes and what they print."""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) for program in programs]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "".join(texts)


def run_forked(number, url, body):
    """Run a program in that many processes at once, forked from one that has imported all; returns what they print."""
    program = (f"import os, sys, traceback\nimport app.data.migrations\nfrom app.data import database as module\n"
               f"from app.data.database import Database\nfrom app.data.schema import *\n"
               f"module.LOCK_WITHIN_S, Database.migrate.__defaults__ = 60, (60,)\n"  # on a machine that is very busy
               f"children, database = [], Database({url!r})\n"
               f"def body(number):\n    {body}\n"
               f"for number in range({number}):\n    children.append(os.fork())\n    if not children[-1]:\n"
               "        try: body(number)\n        except BaseException: traceback.print_exc(); os._exit(1)\n"
               "        os._exit(0)\n"
               "sys.exit(any([os.waitpid(child, 0)[1] for child in children]))")
    codes, text = run_all([program])
    assert codes == [0], text


def test_migrations_make_the_tables_that_the_code_expects(database):
    with database.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        indexes = {(table.name, index.name) for table in metadata.tables.values() for index in table.indexes}
        found = sqlalchemy.inspect(connection)
        assert {(table, index["name"]) for table in found.get_table_names()
                for index in found.get_indexes(table) if not index.get("duplicates_constraint")
                and index["name"] != "jobs_idempotency"} == indexes


def test_tables_that_are_up_to_date_cost_no_import_of_alembic(database, url):
    database.migrate()
    program = (f"import sys; from app.data.database import Database; database = Database({url!r})\n"
               "with database.read() as c: c.exec_driver_sql('SELECT 1')\n"
               "assert database.current; sys.exit('alembic' in sys.modules)")
    assert run_all([program]) == ([0], "")


def test_one_of_several_processes_migrates(url):
    run_forked(8, url, "with database.begin() as c: c.execute(deliveries.insert().values(id=number, job_id='a', url='',"
                       "state='pending', created_at=1.0, attempts_json='[]'))")
    database = Database(url)
    assert count(database) == 8
    assert database.revision() == REVISION
    database.close()


def test_a_process_that_ends_in_the_middle_of_a_migration_leaves_nothing(url):
    program = ("import os, sqlalchemy; from app.data.database import Database\n"
               f"database, statements = Database({url!r}), []\n"
               "@sqlalchemy.event.listens_for(database.engine, 'after_cursor_execute')\n"
               "def after(connection, cursor, statement, *_):\n"
               "    statements.append(statement)\n"
               "    if 'CREATE TABLE history' in statement: os._exit(7)\n"
               "database.migrate()")
    assert run_all([program])[0] == [7]
    database = Database(url)
    assert database.revision() is None
    with database.read() as connection:
        assert {"history", "jobs"} <= set(sqlalchemy.inspect(connection).get_table_names())
    database.close()


def tables_of(url, revision):
    """Make the tables of an earlier revision, with a job and its callback in them."""
    config = Config()
    config.set_main_option("script_location", "app.data:migrations")
    config.set_main_option("path_separator", "os")
    scripts, older = ScriptDirectory.from_config(config), Database(url)
    assert older.revision() is None
    with older.alone(5) as connection, EnvironmentContext(
            config, scripts, fn=lambda found, _: scripts._upgrade_revs(revision, found)) as context:
        context.configure(connection=connection)
        context.run_migrations()
        connection.execute(insert(jobs).values(JOB))
        connection.exec_driver_sql(
            "INSERT INTO deliveries (id, job_id, url, host, state, created_at, next_at, attempts_json) "
            "VALUES ('d1', 'x', 'https://example.org/', 'example.org', 'pending', 1.0, 1.0, '[]'), "
            "('d2', 'of a job that is gone', 'https://example.org/', 'example.org', 'pending', 1.0, 1.0, '[]')")
    assert older.revision() == revision
    older.close()


TEXTS = ("id", "owner", "state", "queue", "request_id", "model", "options_json", "inputs_json", "fingerprint", "unit")
JOB = dict.fromkeys(TEXTS, "x") | {"created_at": 1.0, "is_batch": False, "input_bytes": 1, "total": 1}


@pytest.mark.parametrize("revision", [f"{number:04}" for number in range(1, int(REVISION))])
def test_tables_of_earlier_revisions_are_migrated_with_what_is_in_them(url, revision):
    tables_of(url, revision)
    run_forked(3, url, "database.name()")  # several processes that find them so at once
    database = Database(url)
    with database.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        found = connection.execute(select(jobs)).mappings().one()
        assert {name: found[name] for name in JOB} == JOB
        assert (found["trace_json"], found["turn"]) == (None, 0)
        owner = "x" if revision < "0004" else ""  # since then, a callback has its owner from the beginning
        assert connection.execute(select(deliveries.c.id, deliveries.c.owner, deliveries.c.bytes).order_by(
            deliveries.c.id)).all() == [("d1", owner, 0), ("d2", "", 0)]
    assert database.revision() == REVISION
    other = Database(url)
    assert other.name() == database.name()
    assert re.fullmatch("[0-9a-f]{32}", other.name())
    other.close()
    database.close()


def test_tables_of_a_newer_version_are_refused_and_left_alone(database):
    database.migrate()
    with database.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    older = Database(database.url)
    for _ in range(2):
        with pytest.raises(StartError, match="newer version of this service .revision 9999."), older.begin():
            pass
    older.close()
    assert database.revision() == "9999"


def test_migrate_by_hand(url):
    def migrate(**variables):
        variables = {**{k: v for k, v in os.environ.items() if k != "HISTORY"}, "DATABASE_URL": url, **variables}
        done = subprocess.run([sys.executable, "-m", "app", "migrate"], cwd=ROOT, env=variables, text=True,
                              capture_output=True, check=False)
        return done.returncode, (done.stdout + done.stderr).splitlines()[-1]
    assert migrate() == (1, "error: there is no database: JOBS and HISTORY are off")
    assert migrate(HISTORY="on") == (0, f"the tables are now those of revision {REVISION}")
    assert migrate(HISTORY="on") == (0, f"the tables are up to date (revision {REVISION})")
    code, error = migrate(HISTORY="on", DATABASE_URL="postgresql://nobody:secret@127.0.0.1:1/none")
    assert code == 1
    assert error.startswith("error: DATABASE_URL: ")
    assert "secret" not in error


def test_who_waits_for_a_migration_gives_up_after_a_while(database):
    other = Database(database.url)
    assert other.revision() is None
    with other.alone(5), pytest.raises(sqlalchemy.exc.SQLAlchemyError):
        database.migrate(wait_s=0.2)
    assert database.migrate() is True
    other.close()


def test_nobody_else_may_read_the_file(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'data' / 'service.db'}")
    with database.begin() as connection:
        connection.execute(insert(deliveries), [row(1)])
        names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()}
    assert {names.pop(name) for name in ("service.db", "service.db-wal", "service.db-shm")} == {0o600}
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    database.close()


def test_several_processes_write_at_once(url):
    run_forked(4, url, """for i in range(60):
        with database.begin() as c:
            c.execute(deliveries.select().limit(1)).all()  # a deadlock, if the lock for writing came later
            c.execute(deliveries.insert().values(id=f"{number}-{i}", job_id="a", url="", state="pending",
                                                 created_at=1.0, attempts_json="[]"))
        with database.read() as c:
            c.execute(deliveries.select().limit(1)).all()""")
    database = Database(url)
    assert count(database) == 240
    database.close()


def test_a_reader_waits_for_no_writer_and_sees_one_state(database):
    with database.begin() as connection:
        connection.execute(insert(deliveries), [row(1)])
    with database.begin() as writer:
        writer.execute(insert(deliveries), [row(2)])
        assert count(database) == 1  # if it waited, it would fail: the writer goes on only then
    assert count(database) == 2
    with database.read() as reader:
        for _ in range(2):
            assert reader.execute(select(func.count()).select_from(deliveries)).scalar() == 2
            if database.is_sqlite:  # PostgreSQL shows what others have committed meanwhile
                with database.begin() as connection:
                    connection.execute(insert(deliveries), [row(time.monotonic_ns())])


def test_many_writers_that_wait_leave_connections_to_readers(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'service.db'}")

    def write(number):
        with database.begin(60) as connection:
            connection.execute(insert(deliveries), [row(number)])
    with database.begin() as connection, ThreadPoolExecutor(16) as pool:
        written = [pool.submit(write, number) for number in range(16)]
        until = time.monotonic() + 30
        while database.engine.pool.checkedout() < 17:
            assert time.monotonic() < until, database.engine.pool.status()
            time.sleep(0.01)
        assert count(database) == 0
        connection.execute(insert(deliveries), [row(16)])
        connection.commit()
        assert [future.result(60) for future in written] == [None] * 16
    assert count(database) == 17
    database.close()


# Like one that was killed in the middle of a change, and like one that mends the file then.
MENDING = """import fcntl, sys
with open(sys.argv[1], "r+b") as index:
    fcntl.lockf(index, fcntl.LOCK_EX, 3, 120)
    index.write(bytes(8))
    index.flush()
    print("mending", flush=True)
    sys.stdin.read()"""


def test_a_writer_waits_while_the_file_is_mended_and_other_failures_are_those_of_statements(tmp_path):
    """Those who write catch SQLAlchemyError."""
    database = Database(f"sqlite:///{tmp_path / 'service.db'}")
    with database.begin() as connection:
        connection.execute(insert(deliveries), [row(1)])
    with subprocess.Popen([sys.executable, "-c", MENDING, tmp_path / "service.db-shm"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as mending:
        assert mending.stdout.readline()
        with pytest.raises(sqlalchemy.exc.OperationalError) as e, database.begin(0.1):
            pass
        assert was_too_slow(e.value)
        mending.stdin.close()
    with database.begin() as connection:
        connection.execute(insert(deliveries), [row(2)])
        connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(sqlalchemy.exc.OperationalError, match="readonly") as e, database.begin():
        pass
    assert not was_too_slow(e.value)
    assert count(database) == 2
    database.close()


def test_a_statement_that_takes_too_long_is_ended(url, monkeypatch):
    monkeypatch.setattr(module, "STATEMENT_WITHIN_S", 1)
    database = Database(url)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with pytest.raises(sqlalchemy.exc.OperationalError) as e, database.read() as connection:
        connection.exec_driver_sql(numbers)
    assert was_too_slow(e.value)
    assert count(database) == 0
    database.close()


# --- outages ---

@pytest.fixture(scope="module")
def own_server(tmp_path_factory):
    """A PostgreSQL for tests that stop it."""
    need("initdb")
    server = Postgres(tmp_path_factory.mktemp("own")).start()
    yield server
    server.remove()


@pytest.fixture
def on_own_server(own_server, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_WITHIN_S", 5)
    database = Database(own_server.database())
    database.migrate()
    yield database
    database.close()


def returns(call):
    """Its value, once it no longer fails."""
    until = time.monotonic() + RETURNS_WITHIN_S
    while True:
        try:
            return call()
        except (sqlalchemy.exc.SQLAlchemyError, OSError):
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_it_comes_back_after_the_server_was_gone(on_own_server, own_server, end):
    assert count(on_own_server) == 0
    getattr(own_server, end)()
    with pytest.raises(sqlalchemy.exc.OperationalError):
        count(on_own_server)
    own_server.start()
    assert returns(lambda: count(on_own_server)) == 0
    assert on_own_server.engine.pool.checkedout() == 0
    getattr(own_server, end)()
    own_server.start()
    assert count(on_own_server) == 0  # with a new connection, as the old one is found to be dead


def test_a_server_that_hangs_holds_nobody_for_good(on_own_server, own_server, monkeypatch):
    monkeypatch.setattr(postgres.Connection, "answer_within_s", 1)
    assert count(on_own_server) == 0
    failures = []

    def fail():
        try:
            count(on_own_server)
        except sqlalchemy.exc.SQLAlchemyError as e:
            failures.append(e)
    threads = [threading.Thread(target=fail) for _ in range(6)]  # more than there are connections
    own_server.pause()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(RETURNS_WITHIN_S)
        assert len(failures) == 6
    finally:
        own_server.resume()
    assert returns(lambda: count(on_own_server)) == 0
    assert on_own_server.engine.pool.checkedout() == 0
    name = on_own_server.url.database
    backends = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}' AND state = 'active'"
    until = time.monotonic() + RETURNS_WITHIN_S
    while left := own_server.execute(backends):  # they see late who has left
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_a_writer_that_is_killed_blocks_nobody(url):
    database = Database(url)
    database.migrate()
    program = (f"from app.data.database import Database; from app.data.schema import *; import time\n"
               f"database = Database({url!r})\n"
               "with database.begin() as c:\n"
               "    c.execute(deliveries.insert().values(id='1', job_id='a', url='', state='', created_at=1.0,"
               "attempts_json='[]'))\n    print('written', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not is_running(process.pid)
    with database.begin() as connection:
        connection.execute(insert(deliveries), [row(1)])
    assert count(database) == 1
    database.close()
