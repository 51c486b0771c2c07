"""A server with the interface of OpenAI's, for one machine: `graft serve`.

shared_base    one loaded base under several adapters
models         the models that are served, by name
worker         the thread that decodes, and its queue
text           from tokens to text, up to a stop string
requests       a request's settings, checked
prompts        a request's token ids
answers        responses and the pieces of a stream
errors         error responses
guards         who may send a request
app            the routes
listening      the socket, and the end
page           the chat page
"""
