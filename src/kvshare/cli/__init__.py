"""The command line: `kvshare VERB`. A verb is a module here, imported when it is called."""
