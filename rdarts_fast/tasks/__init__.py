"""What a task is: its data, its networks, its loss and its measure."""
