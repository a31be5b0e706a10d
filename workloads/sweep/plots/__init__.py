"""Plots of a sweep's report. Each function returns None if its plot would show nothing."""
