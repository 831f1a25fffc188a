"""A service for exported models, HTTP and gRPC: our front owns the sockets, Paddle Serving computes in worker processes."""
