"""Log-domain Sinkhorn on a given log-kernel."""
