//! A captured CUDA graph, as a caller such as PyTorch would make one around our launches.
#![expect(unsafe_code, reason = "calls into the CUDA driver")]

use anyhow::Context;
use calibc_runtime::cuda::Stream;
use cudarc::driver::{CudaContext, result, sys};

/// A graph of what was submitted to a stream while it was captured.
pub(crate) struct Graph {
    // Current on the thread, as a foreign caller's context is: the engine itself leaves none behind.
    _context: std::sync::Arc<CudaContext>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

fn raw(stream: &Stream) -> sys::CUstream {
    stream.raw() as usize as sys::CUstream
}

impl Graph {
    /// Captures what `submit` puts on `stream`.
    pub(crate) fn capture(stream: &Stream, submit: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let context = CudaContext::new(0).context("make the primary context current")?;
        // A call of this thread that allocates or waits fails in this mode; other tests may go on.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives through the call, and the driver is initialised since it exists.
        unsafe { result::stream::begin_capture(raw(stream), mode) }.context("begin capture")?;
        let submitted = submit();
        // SAFETY: as above; a capture is under way.
        let graph = unsafe { result::stream::end_capture(raw(stream)) };
        submitted?;
        let graph = graph.context("end capture")?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just made.
        unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }.result().context("instantiate the graph")?;
        Ok(Self { _context: context, graph, exec })
    }

    /// Submits the whole graph to `stream`.
    pub(crate) fn replay(&self, stream: &Stream) -> anyhow::Result<()> {
        // SAFETY: both handles live.
        Ok(unsafe { result::graph::launch(self.exec, raw(stream)) }?)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `capture`, destroyed once; failures leave nothing to do.
        unsafe {
            let _ = result::graph::exec_destroy(self.exec);
            let _ = result::graph::destroy(self.graph);
        }
    }
}
