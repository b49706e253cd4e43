//! Bundles by number: what a torch op, which takes only tensors and numbers, names a bundle with.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use calibc_runtime::{Bundle, Engine, Residency, RuntimeError};

/// A bundle, and its engine on each GPU it was used on.
pub(crate) struct Loaded {
    /// The number; never used again in this process.
    pub(crate) handle: i64,
    pub(crate) bundle: Bundle,
    /// By ordinal of the GPU.
    engines: RwLock<Vec<Option<Arc<Engine>>>>,
    /// Held while an engine is made: two of them would take twice the memory.
    loading: Mutex<()>,
}

/// Everything alive, by number. A bundle lives as long as Python holds it.
static ALIVE: RwLock<Option<HashMap<i64, Weak<Loaded>>>> = RwLock::new(None);
static NEXT: AtomicI64 = AtomicI64::new(1);

impl Loaded {
    pub(crate) fn new(bundle: Bundle) -> Arc<Self> {
        let handle = NEXT.fetch_add(1, Ordering::Relaxed);
        let (engines, loading) = Default::default();
        let loaded = Arc::new(Self { handle, bundle, engines, loading });
        let mut alive = ALIVE.write().unwrap_or_else(PoisonError::into_inner);
        alive.get_or_insert_default().insert(handle, Arc::downgrade(&loaded));
        loaded
    }

    /// The bundle of this number; `None` once Python has let go of it.
    pub(crate) fn of(handle: i64) -> Option<Arc<Self>> {
        ALIVE.read().unwrap_or_else(PoisonError::into_inner).as_ref()?.get(&handle)?.upgrade()
    }

    /// The engine on GPU `device`, made on first use with all steps there.
    pub(crate) fn engine(&self, device: u32) -> Result<Arc<Engine>, RuntimeError> {
        match self.there(device) {
            Some(engine) => Ok(engine),
            None => self.load(device, Residency::All),
        }
    }

    /// The engine on GPU `device`, if it was made.
    pub(crate) fn there(&self, device: u32) -> Option<Arc<Engine>> {
        self.engines.read().unwrap_or_else(PoisonError::into_inner).get(device as usize).cloned().flatten()
    }

    /// Makes the engine on GPU `device`. One that is there stays as it is: graphs may hold its addresses.
    pub(crate) fn load(&self, device: u32, residency: Residency) -> Result<Arc<Engine>, RuntimeError> {
        let _loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = self.there(device) {
            return Ok(engine);
        }
        let at = device as usize;
        let engine = Arc::new(Engine::with_residency(device, &self.bundle, residency)?);
        let mut engines = self.engines.write().unwrap_or_else(PoisonError::into_inner);
        if engines.len() <= at {
            engines.resize(at + 1, None);
        }
        engines[at] = Some(Arc::clone(&engine));
        Ok(engine)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Some(alive) = ALIVE.write().unwrap_or_else(PoisonError::into_inner).as_mut() {
            alive.remove(&self.handle);
        }
    }
}
