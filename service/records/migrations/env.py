"""How alembic runs the steps.

On the connection that `service.records.database.migrate` hands it.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
