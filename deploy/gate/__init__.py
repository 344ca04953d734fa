"""What stands between clients and Cog's runtime: lets in the requests that are meant, in order, and keeps it running.

The runtime is a child process at an address of its own. It trusts whoever reaches it: anyone may shut it down, ids
become names of folders, webhooks go anywhere, and a worker that died stays dead.
"""
