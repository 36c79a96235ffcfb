"""TorchServe's gRPC messages: the hand-written .proto files and what protoc makes of them."""
