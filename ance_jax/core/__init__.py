"""Folders, processes, devices and lines: nothing about retrieval."""
