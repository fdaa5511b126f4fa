//! Tests with real guests under a real monitor.

mod boot;
