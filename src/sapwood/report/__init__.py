"""What a run left, as one page: `write_report` makes a file, `serve` shows the same page while the run goes on."""

from sapwood.report.page import Written, write_report
from sapwood.report.server import Server

__all__ = ["Server", "Written", "write_report"]
