"""Files, processes, devices and logging; nothing about retrieval."""
