"""Which commands there are.

Their modules are imported when a command is called, so `bitwright --help` answers at once.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        name: what users type, and the name of the function or group of commands in its module.
        module: module of this package.
        summary: one sentence of help.
    """

    name: str
    module: str
    summary: str

    @property
    def place(self) -> str:
        """Where the command is, as cyclopts imports it."""
        return f"service.cli.{self.module}:{self.name}"


COMMANDS = {
    "Models": (
        Command("run", "models", "Quantize MODEL within a size budget, and evaluate the result."),
        Command("profile", "models", "Measure what quantizing each layer of MODEL costs."),
        Command("quantize", "models", "Quantize MODEL by a plan."),
        Command("evaluate", "models", "Compare quantized checkpoints with MODEL."),
        Command("report", "reports", "Show the report of a finished run."),
    ),
    "Profiles": (
        Command("plan", "plans", "Choose the fidelity of each layer for a budget."),
        Command("frontier", "plans", "Show the predicted loss of the best plan of each budget."),
        Command("diff", "plans", "Show how two plans differ."),
    ),
    "Job service": (
        Command("serve", "serving", "Serve the REST interface, with its documentation at /docs."),
        Command("worker", "working", "Run the jobs that the service accepts."),
        Command("migrate", "tenants", "Bring the database to the current schema."),
        Command("quota", "tenants", "Set the limits of a tenant."),
        Command("keys", "tenants", "Create, list and revoke API keys."),
    ),
    "This machine": (
        Command("cache", "cache", "List and remove what is kept of finished stages."),
        Command("doctor", "doctor", "Show what this machine or a model offers."),
    ),
}
"""The commands by groups, in the order of the help page."""
