"""Migrations of the tables, run by Alembic. A new one: a file in versions/ whose down_revision is the last one."""
import logging

from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory

from app.config import StartError
from app.data.schema import metadata

logging.getLogger("alembic").setLevel(logging.WARNING)


def upgrade(connection):
    """Bring the tables of this connection, which is in a transaction, to the newest revision. Raises StartError if they
    have one that this version does not know."""
    config = Config()
    config.set_main_option("script_location", "app.data:migrations")
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    found, newest = MigrationContext.configure(connection).get_current_revision(), scripts.get_current_head()
    if found == newest:
        return
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise StartError(f"the database has tables of a newer version of this service (revision {found})")
    with EnvironmentContext(config, scripts, fn=lambda revision, _: scripts._upgrade_revs("head", revision)) as context:
        context.configure(connection=connection, target_metadata=metadata)
        context.run_migrations()
