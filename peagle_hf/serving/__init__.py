"""Starting vLLM's servers, for hidden states and for drafters, and chatting with one."""
