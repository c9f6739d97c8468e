"""The command `worker`: runs jobs."""

from service.cli.parameters import Cache, Data
from service.logs import set_up_service_logging
from service.settings import ServiceSettings, default_cache, default_data
from service.worker.worker import run_worker

DATA, CACHE = default_data(), default_cache()


def worker(*, data: Data = DATA, cache: Cache = CACHE) -> None:
    """Run the jobs that the service accepts, until the process is told to end."""
    set_up_service_logging()
    run_worker(ServiceSettings.read(data=data, cache=cache))
