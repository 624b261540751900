//! What the engine's answers to a request took, for its line in the log and its trace.

use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};

use crate::request::Completion;
use crate::telemetry::ChoiceRecord;

/// A request's choices, each recorded when it is submitted and again when it ends.
#[derive(Debug, Default)]
pub struct AccessRecord(Mutex<Vec<ChoiceRecord>>);

impl AccessRecord {
    pub fn submit(&self) {
        self.0.lock().push(ChoiceRecord { submitted: SystemTime::now(), done: None });
    }

    pub fn complete(&self, choice: usize, done: &Completion) {
        if let Some(record) = self.0.lock().get_mut(choice) {
            record.done = Some((done.usage, done.timings));
        }
    }

    pub fn choices(&self) -> MutexGuard<'_, Vec<ChoiceRecord>> {
        self.0.lock()
    }
}
