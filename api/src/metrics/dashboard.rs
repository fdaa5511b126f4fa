//! The Grafana dashboard, `resources/grafana/cutover.json`, asks for nothing that no VM tells.

use std::collections::BTreeSet;

use cutover_vmm::protection::MemberStatus;
use serde_json::Value;

use super::prometheus::text;
use super::testing::stats;
use crate::log::LogCounts;
use crate::server::v1::types::{
    MigrationEndV1, MigrationPhaseV1, MigrationProgressV1, MigrationReportV1, MigrationStatusV1,
};

const DASHBOARD: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../resources/grafana/cutover.json"
));

/// Names of all metrics: those of a VM that has every device, is protected, was migrated and is being migrated.
fn exported() -> BTreeSet<String> {
    let mut vm = stats(1);
    vm.protection = Some(MemberStatus::default());
    let progress = MigrationProgressV1 {
        phase: MigrationPhaseV1::PreCopy,
        round: 1,
        pages_sent: 1,
        pages_left: 1,
        bytes_sent: 1,
        bytes_per_second: 1,
        dirty_pages_per_second: 1,
        expected_downtime_ns: Some(1),
        throttle_percent: 1,
    };
    let migration = MigrationStatusV1 {
        under_way: Some(progress),
        last: Some(MigrationEndV1::Moved {
            report: MigrationReportV1::default(),
        }),
    };
    let text = text("web", vm, migration, LogCounts::default()).expect("a String takes it");
    let numbers = text.lines().filter(|line| !line.starts_with('#'));
    let names = numbers.filter_map(|line| line.split(['{', ' ']).next());
    names.map(str::to_owned).collect()
}

/// Adds the strings under `key`, wherever it is in `value`, to `found`.
fn collect<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(members) => {
            found.extend(members.get(key).and_then(Value::as_str));
            members.values().for_each(|member| collect(member, key, found));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, key, found)),
        _ => {}
    }
}

/// The names in `query` that begin as those of this monitor do.
fn names_in(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("cutover_"))
}

#[test]
fn every_query_of_the_dashboard_is_about_metrics_that_there_are() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let mut queries = Vec::new();
    for key in ["expr", "query", "definition"] {
        collect(&dashboard, key, &mut queries);
    }
    let asked: BTreeSet<&str> = queries.iter().copied().flat_map(names_in).collect();
    assert!(asked.contains("cutover_vm") && asked.len() > 50, "{asked:?}");
    let exported = exported();
    let unknown: Vec<_> = asked.into_iter().filter(|name| !exported.contains(*name)).collect();
    assert_eq!(unknown, Vec::<&str>::new());
}

#[test]
fn every_panel_has_an_id_of_its_own_and_a_query_unless_it_is_a_row() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("a list");
    let ids: BTreeSet<_> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let mut queries = Vec::new();
        collect(panel, "expr", &mut queries);
        assert!(!queries.is_empty(), "{}", panel["title"]);
    }
}
