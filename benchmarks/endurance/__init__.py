"""What hours of use leave behind: memory, open files and threads of commands that do a lot."""
