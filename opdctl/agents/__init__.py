"""Rollouts of agents: the user's function plays an episode against the student, and every id is recorded."""
