"""The commands of `csrm`: each module has the arguments, the configuration and one call of one command.

`csrm --help` lists them in the order of work, and jobs/ starts them with spark-submit.
Only jobs/, export/, each room's `__main__` and other commands import it. It may import every room.
"""
