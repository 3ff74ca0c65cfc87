"""The loop, and all that a step, a refresh and a resume need."""
