"""Memory reports: what a model's cache costs, what sharing, windows and precision save, and what fits. Imports neither torch nor numpy."""

from kvshare.planner.models import ModelConfig, bundled_names, resolve
from kvshare.planner.report import ModelPlan, Weights, Without, check_fits, plan

__all__ = ["ModelConfig", "ModelPlan", "Weights", "Without", "bundled_names", "check_fits", "plan", "resolve"]
