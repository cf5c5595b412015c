"""vLLM: the engine in this process, the server in another, and the plugin that both load."""
