"""The templates of pages."""

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from service.report.summary import figure, with_error


def page_template(name: str) -> Template:
    """Return a template; what it inserts is escaped, and what is missing is an error."""
    environment = Environment(
        loader=PackageLoader("service.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"figure": figure, "with_error": with_error}
    return environment.get_template(name)
