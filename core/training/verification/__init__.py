"""Setup verification: what this machine, this configuration and these backends are fit for."""

from core.training.verification.report import Check, Report
from core.training.verification.verifying import Request, verify

__all__ = ["Check", "Report", "Request", "verify"]
