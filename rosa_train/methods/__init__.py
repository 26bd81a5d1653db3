"""The methods, their budgets of parameters, and their schedules."""
