"""The server: an OpenAI-compatible HTTP interface to the engine, and a page on which to watch it.

The engine runs in a process of its own (`worker`); `async_engine` is its other end; the rest knows text and HTTP.
"""
