//! Whatever is written over a chain reads back as if it had been written to one array of pages.

use std::os::unix::fs::FileExt;

use cutover_snapshot::Error;
use cutover_snapshot::chain::{CHAIN_MAX, Chain};
use cutover_snapshot::image::{Layout, PageSource, Pages, Progress, Scan, Shape};
use cutover_snapshot::manifest::{Base, Parent};
use cutover_snapshot::merge::merge;
use cutover_snapshot::store::Store;
use cutover_snapshot::verify::verify;
use proptest::prelude::*;

use crate::hostile::{reseal, set};
use crate::sample::{PAGE, Reference, draft, noise, page, put_image, read_all, shape, store};

const NAME: &str = "disk-data";

/// What one snapshot of a chain writes.
#[derive(Clone, Debug)]
struct Layer {
    pages: u64,
    complete: bool,
    layout: Layout,
    /// Pages in the order they are written, each once.
    writes: Vec<(u64, Vec<u8>)>,
}

fn layer() -> impl Strategy<Value = Layer> {
    let content = prop_oneof![
        2 => Just(page(0)),
        3 => (1..=255_u8).prop_map(page),
        2 => any::<u64>().prop_map(noise),
    ];
    let layout = prop_oneof![
        Just(Layout::Flat),
        Just(Layout::Packed),
        Just(Layout::Compressed { level: 1 })
    ];
    let writes = prop::collection::btree_map(0..200_u64, content, 0..150)
        .prop_flat_map(|writes| Just(writes.into_iter().collect::<Vec<_>>()).prop_shuffle());
    let sorted = any::<bool>();
    (100..200_u64, prop::bool::weighted(0.2), layout, writes, sorted).prop_map(
        |(pages, complete, layout, mut writes, sorted)| {
            writes.retain(|(page, _)| *page < pages);
            if sorted {
                writes.sort();
            }
            Layer {
                pages,
                complete,
                layout,
                writes,
            }
        },
    )
}

/// Writes the chain; returns what the newest snapshot must read as.
fn write_chain(store: &Store, layers: &[Layer]) -> Reference {
    let mut reference = Reference::default();
    let mut parent = None;
    for (number, layer) in layers.iter().enumerate() {
        let base = if layer.complete || number == 0 {
            Base::Zero
        } else {
            Base::Parent
        };
        let layout = match layer.layout {
            Layout::Flat if base == Base::Parent => Layout::Packed,
            layout => layout,
        };
        if base == Base::Zero {
            reference.content.clear();
        }
        reference.resize(layer.pages);
        let name = format!("snapshot-{number}");
        let mut writer = store.create(&name, draft(1, parent.as_ref())).expect("begun");
        let writes = layer.writes.iter().map(|(page, bytes)| (*page, &bytes[..]));
        put_image(&mut writer, NAME, shape(layer.pages, base, layout), writes).expect("written");
        parent = Some(writer.commit().expect("committed"));
        for (page, bytes) in &layer.writes {
            reference.put(*page, bytes);
        }
    }
    reference
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_chain_reads_as_the_pages_written_last(layers in prop::collection::vec(layer(), 1..8)) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = store(dir.path());
        let reference = write_chain(&store, &layers);
        let newest = dir.path().join(format!("snapshot-{}", layers.len() - 1));
        let chain = Chain::open(&newest).expect("a chain");
        prop_assert_eq!(chain.snapshots().len(), layers.len());
        prop_assert_eq!(&read_all(&chain.image(NAME).expect("an image")).expect("readable"), &reference);
        prop_assert_eq!(verify(&chain, &mut |_| ()).damage.len(), 0);

        for (name, layout) in [("flat", Layout::Flat), ("small", Layout::Compressed { level: 3 })] {
            merge(&chain, &store, name, layout, &mut |_| ()).expect("merged");
            let merged = Chain::open(&dir.path().join(name)).expect("a chain");
            prop_assert_eq!(merged.snapshots().len(), 1);
            prop_assert_eq!(verify(&merged, &mut |_| ()).damage.len(), 0);
            let image = merged.image(NAME).expect("an image");
            prop_assert_eq!(&read_all(&image).expect("readable"), &reference);
            prop_assert_eq!(image.flat_file().is_some(), layout == Layout::Flat);
        }
    }

    #[test]
    fn pages_are_found_in_any_order(layers in prop::collection::vec(layer(), 1..5), order in prop::collection::vec(0..200_u64, 50)) {
        let dir = tempfile::tempdir().expect("a directory");
        let reference = write_chain(&store(dir.path()), &layers);
        let newest = dir.path().join(format!("snapshot-{}", layers.len() - 1));
        let image = Chain::open(&newest).expect("a chain").image(NAME).expect("an image");
        let mut reader = image.reader().expect("a reader");
        for page in order {
            let found = reader.at(page).expect("readable");
            prop_assert_eq!(found.is_some(), page < reference.pages);
            let bytes = found.and_then(|found| found.bytes).map(|bytes| &bytes[..PAGE as usize]);
            prop_assert_eq!(bytes, reference.content.get(&page).map(|bytes| &bytes[..]));
        }
    }
}

#[test]
fn a_flat_file_has_each_page_at_its_place_and_holes_elsewhere() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = store(dir.path()).create("flat", draft(1, None)).expect("begun");
    let pages = 1 << 20;
    let writes = [
        (3, &noise(1)[..]),
        (4, &page(0)),
        (5, &noise(2)),
        (pages - 2, &noise(3)),
    ];
    put_image(&mut writer, NAME, shape(pages, Base::Zero, Layout::Flat), writes).expect("written");
    writer.commit().expect("committed");

    let image = Chain::open(&dir.path().join("flat"))
        .expect("a chain")
        .image(NAME)
        .expect("an image");
    let file = image.flat_file().expect("flat");
    for (number, expected) in writes {
        let mut bytes = page(0xff);
        file.read_exact_at(&mut bytes, number * u64::from(PAGE))
            .expect("within the file");
        assert!(bytes == expected, "page {number}");
    }
    let metadata = file.metadata().expect("metadata");
    assert!(
        metadata.len() > pages * u64::from(PAGE),
        "the index comes after the pages"
    );
    let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    assert!(allocated < 1 << 20, "{allocated} bytes are allocated for three pages");
}

#[test]
fn an_image_tells_which_of_its_pages_were_saved_before_their_turn() {
    let dir = tempfile::tempdir().expect("a directory");
    for layout in [Layout::Flat, Layout::Packed, Layout::Compressed { level: 1 }] {
        let name = format!("{layout:?}").split(' ').next().expect("a word").to_owned();
        let mut writer = store(dir.path()).create(&name, draft(1, None)).expect("begun");
        let saved = [0, 1, 2, 40, 41, 30, 31, 50, 7, 60].map(|number| (number, noise(number + 1)));
        let writes = saved.iter().map(|(number, bytes)| (*number, &bytes[..]));
        put_image(&mut writer, NAME, shape(64, Base::Zero, layout), writes).expect("written");
        writer.commit().expect("committed");
        let chain = Chain::open(&dir.path().join(&name)).expect("a chain");
        let image = chain.image(NAME).expect("an image");
        assert_eq!(image.out_of_order(), [30..32, 7..8], "{name}");
    }
}

#[test]
fn what_a_shorter_image_cut_off_stays_gone_when_it_grows_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let layer = |pages, writes: &[(u64, u8)]| Layer {
        pages,
        complete: false,
        layout: Layout::Packed,
        writes: writes.iter().map(|(number, byte)| (*number, page(*byte))).collect(),
    };
    let layers = [layer(10, &[(2, 1), (7, 2)]), layer(5, &[]), layer(10, &[(9, 3)])];
    let reference = write_chain(&store(dir.path()), &layers);
    assert_eq!(reference.content.keys().copied().collect::<Vec<_>>(), [2, 9]);
    let chain = Chain::open(&dir.path().join("snapshot-2")).expect("a chain");
    assert_eq!(
        read_all(&chain.image(NAME).expect("an image")).expect("readable"),
        reference
    );
}

#[test]
fn a_source_is_copied_with_progress_up_to_its_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let layer = Layer {
        pages: 300,
        complete: true,
        layout: Layout::Packed,
        writes: (0..300).map(|number| (number, noise(number + 1))).collect(),
    };
    let reference = write_chain(&store, &[layer]);
    let image = Chain::open(&dir.path().join("snapshot-0"))
        .expect("a chain")
        .image(NAME)
        .expect("an image");
    let mut scan = Scan::new(image.reader().expect("a reader"));
    let mut steps = Vec::new();
    let mut writer = store.create("copy", draft(1, None)).expect("begun");
    let mut copy = writer.image(NAME, shape(300, Base::Zero, Layout::Flat)).expect("begun");
    copy.copy_from(&mut scan, &mut |step| steps.push(step)).expect("copied");
    writer.complete(copy).expect("completed");
    writer.commit().expect("committed");

    let total = 300 * u64::from(PAGE);
    assert_eq!(steps.last(), Some(&Progress { done: total, total }));
    assert!(steps.len() > 1 && steps.is_sorted_by_key(|step| step.done));
    let copy = Chain::open(&dir.path().join("copy"))
        .expect("a chain")
        .image(NAME)
        .expect("an image");
    assert_eq!(read_all(&copy).expect("readable"), reference);
}

#[test]
fn images_are_written_by_several_threads_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = store(dir.path()).create("both", draft(1, None)).expect("begun");
    let images = ["disk-a", "disk-b"].map(|name| {
        let image = writer.image(name, shape(100, Base::Zero, Layout::Compressed { level: 1 }));
        image.expect("begun")
    });
    let threads = images.map(|mut image| {
        std::thread::spawn(move || {
            for number in 0..100 {
                image.put(number, &noise(number + 1)).expect("written");
            }
            image
        })
    });
    for thread in threads {
        writer.complete(thread.join().expect("no panic")).expect("completed");
    }
    writer.commit().expect("committed");
    let chain = Chain::open(&dir.path().join("both")).expect("a chain");
    for name in ["disk-a", "disk-b"] {
        let image = read_all(&chain.image(name).expect("an image")).expect("readable");
        assert!((0..100).eq(image.content.keys().copied()));
        assert!(image.content.iter().all(|(number, bytes)| *bytes == noise(number + 1)));
    }
}

#[test]
fn pages_that_cannot_be_had_are_the_end_of_the_snapshot() {
    struct Broken;
    impl PageSource for Broken {
        fn bytes_total(&self) -> u64 {
            0
        }
        fn next_pages(&mut self) -> Result<Option<Pages<'_>>, Error> {
            Err(Error::Source("the guest is gone".into()))
        }
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut writer = store(dir.path()).create("broken", draft(1, None)).expect("begun");
    let mut image = writer.image(NAME, shape(1, Base::Zero, Layout::Packed)).expect("begun");
    let error = image.copy_from(&mut Broken, &mut |_| ()).expect_err("cannot be had");
    assert!(matches!(error, Error::Source(_)), "{error}");
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0);
}

#[test]
fn what_could_not_be_read_back_is_not_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let begin = |base| {
        let mut writer = store.create("wrong", draft(1, None)).expect("begun");
        let image = writer.image(NAME, shape(4, base, Layout::Packed)).expect("begun");
        (writer, image)
    };
    let reason = |error: Error| error.to_string();

    let (mut writer, mut image) = begin(Base::Zero);
    image.put(1, &page(1)).expect("written");
    image.put(1, &page(2)).expect("not noticed yet");
    assert!(reason(writer.complete(image).expect_err("twice")).contains("page 1 is there twice"));
    drop(writer);

    let (writer, mut image) = begin(Base::Zero);
    assert!(reason(image.put(4, &page(1)).expect_err("outside")).contains("4096 bytes from page 4 of 4"));
    assert!(reason(image.put(0, &[1; 100]).expect_err("part of a page")).contains("100 bytes from page 0"));
    assert!(reason(writer.commit().expect_err("open")).contains("'disk-data' was begun and not completed"));

    let mut writer = store.create("wrong", draft(1, None)).expect("begun");
    let memory = shape(2, Base::Zero, Layout::Packed);
    put_image(&mut writer, "memory", memory, []).expect("written");
    assert!(reason(writer.commit().expect_err("size")).contains("are not the memory of the VM"));

    let mut writer = store.create("wrong", draft(1, None)).expect("begun");
    for (name, shape) in [
        (NAME, shape(1, Base::Parent, Layout::Flat)),
        ("../memory", shape(1, Base::Zero, Layout::Flat)),
        (NAME, shape(u64::MAX, Base::Zero, Layout::Flat)),
        (
            NAME,
            Shape {
                page_bytes: 1000,
                ..shape(1, Base::Zero, Layout::Flat)
            },
        ),
    ] {
        assert!(
            matches!(writer.image(name, shape), Err(Error::Unwritable { .. })),
            "{name} {shape:?}"
        );
    }
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0);
}

#[test]
fn a_chain_is_neither_made_nor_read_beyond_its_limit() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let mut parent = None;
    for number in 0..CHAIN_MAX {
        let writer = store
            .create(&format!("s{number}"), draft(1, parent.as_ref()))
            .expect("begun");
        parent = Some(writer.commit().expect("committed"));
    }
    let newest = parent.expect("written");
    assert_eq!(Chain::open(&newest.path).expect("a chain").snapshots().len(), CHAIN_MAX);
    let refused = store.create("more", draft(1, Some(&newest)));
    let error = refused.err().expect("too long");
    assert!(error.to_string().contains("merge it"), "{error}");

    let longer = store
        .create("more", draft(1, None))
        .expect("begun")
        .commit()
        .expect("committed");
    let parent = serde_json::to_value(Parent::from(&newest)).expect("JSON");
    reseal(&longer.path, |manifest| set(manifest, "/parent", parent));
    assert!(matches!(Chain::open(&longer.path), Err(Error::ChainLength(_))));
}

#[test]
fn nothing_is_built_on_a_parent_that_is_gone_or_has_no_such_image() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let mut writer = store.create("base", draft(1, None)).expect("begun");
    put_image(&mut writer, NAME, shape(1, Base::Zero, Layout::Packed), []).expect("written");
    let base = writer.commit().expect("committed");

    let mut writer = store.create("child", draft(1, Some(&base))).expect("begun");
    let larger = Shape {
        page_bytes: 2 * PAGE,
        ..shape(1, Base::Parent, Layout::Packed)
    };
    for (name, shape) in [("disk-other", shape(1, Base::Parent, Layout::Packed)), (NAME, larger)] {
        let error = writer.image(name, shape).err().expect("no such image");
        assert!(
            error.to_string().contains("is based on a parent that has none"),
            "{error}"
        );
    }
    drop(writer);
    std::fs::remove_dir_all(&base.path).expect("removed");
    let refused = store.create("child", draft(1, Some(&base)));
    assert!(matches!(refused.err(), Some(Error::ParentMissing { .. })));
}

#[test]
fn an_image_is_read_by_several_threads_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let layer = |seed: u64, step: usize| Layer {
        pages: 400,
        complete: false,
        layout: Layout::Compressed { level: 1 },
        writes: (0..400)
            .step_by(step)
            .map(|number| (number, noise(seed + number)))
            .collect(),
    };
    let reference = write_chain(&store(dir.path()), &[layer(1, 2), layer(1000, 3)]);
    let chain = Chain::open(&dir.path().join("snapshot-1")).expect("a chain");
    let image = chain.image(NAME).expect("an image");
    assert_eq!(image.stored_pages(), reference.content.len() as u64);
    let mut reader = image.reader().expect("a reader");
    let threads = [(); 4].map(|()| {
        let image = image.clone();
        std::thread::spawn(move || read_all(&image).expect("readable"))
    });
    // A reader keeps its image, whoever else lets go of it.
    drop((image, chain));
    for thread in threads {
        assert_eq!(thread.join().expect("no panic"), reference);
    }
    let found = reader.at(0).expect("readable").expect("a page");
    assert_eq!(
        found.bytes.map(|bytes| &bytes[..PAGE as usize]),
        reference.content.get(&0).map(|page| &page[..])
    );
}
