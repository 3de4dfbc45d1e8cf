"""What can be asked of a graph that was captured: in which order it runs, what its calls do, what lies where."""
