"""What every run needs and Lightning lacks; the command line adds its callbacks by itself."""
